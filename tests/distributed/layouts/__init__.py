"""Every layout of a model over processes, compared with one process: cases, launches and what each rank runs."""
