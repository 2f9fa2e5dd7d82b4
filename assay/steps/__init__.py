"""What the stages of a run do, by room: each hands files from one to the next."""
