"""What a run will take of memory and time, and how it is made to fit."""
