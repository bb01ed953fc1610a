"""The check of a GPU (gpu_check.py): its phases, what they run on, and its report."""
