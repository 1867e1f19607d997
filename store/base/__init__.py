"""What everything in `store` leans on: errors and the text forms of data. Uses no other folder."""
