"""The first edition's plumbing, which lessons 18 and 19 stand on until they are rewritten; it goes with the last."""
