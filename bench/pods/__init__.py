"""Whole models on whole pods, compiled for TPUs on a machine without one."""
