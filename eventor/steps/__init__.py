"""What runs the steps: the processes, what goes in and out of them, and how they end."""
