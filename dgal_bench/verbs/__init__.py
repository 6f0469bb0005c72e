"""What each verb of the command line does: a function of the command, whose answer is the exit code."""
