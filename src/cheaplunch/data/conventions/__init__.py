"""Folder conventions: each recognises a folder by what is in it and lists its cases."""
