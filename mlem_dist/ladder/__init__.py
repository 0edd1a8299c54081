"""Ladders of drift approximators and their folders."""
