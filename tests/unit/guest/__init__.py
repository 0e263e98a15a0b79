"""Tests of guests in this process."""
