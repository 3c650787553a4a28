"""What is kept: the tables of a store, its transactions, and who owns a run in it."""
