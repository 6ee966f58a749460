"""Architecture families: one file each, that reads top to bottom like the paper."""
