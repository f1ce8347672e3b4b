"""The commands, a file each; what is heavy is imported when one runs."""
