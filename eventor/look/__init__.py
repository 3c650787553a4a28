"""What people look at: pictures of a flow, reports of a run, and how far it is."""
