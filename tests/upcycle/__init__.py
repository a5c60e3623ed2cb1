"""Tests of moexpand.upcycle."""
