"""Families: one file for each family of pipelines, a subclass of ours and the stock one."""
