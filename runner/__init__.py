"""How a lesson runs on this machine: its processes, and what it leaves as it was."""
