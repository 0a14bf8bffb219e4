"""Whole data sets of video files, purified by many processes, each file once."""
