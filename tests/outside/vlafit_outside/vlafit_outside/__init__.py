"""Additions to vlafit, one file each."""
