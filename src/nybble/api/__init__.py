"""What `nybble` exports: a function for each verb, and the parts that a training loop of one's own is made of.

The command line calls the same functions. Options are checked before anything heavy is imported.
"""
