"""The first edition's plumbing, which lessons 15 to 19 stand on until they are rewritten; it goes with the last."""
