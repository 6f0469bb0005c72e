"""Tables and figures as pure functions of recorded rows."""
