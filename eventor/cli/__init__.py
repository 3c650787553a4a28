"""The command `eventor`, which needs the extra `cli`."""
