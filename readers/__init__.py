"""Reading of files that may be anything: downloaded data sets, and your own images. Nothing here decides a number:
what is read is known by its content.
"""
