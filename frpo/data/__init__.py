"""Rows from files and the hub, and the batches made of them; a stream resumes at the exact next row."""
