"""What an option is, each group of options once, and the groups that a verb takes."""
