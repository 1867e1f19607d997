"""What all analyses share: the cluster that runs jobs and adds up their results, open archives, moments and plots.

Uses `store` only.
"""
