"""What follows from what: definitions and rules, pure, without a database and without a process."""
