"""The steps that bring a database from one release's tables to the next's.

``versions/NNNN_slug.py``, one linear chain. A step is written for SQLite and PostgreSQL alike, and is
never changed once it has been released: databases have taken it. A new NOT NULL column needs a
``server_default``, for the rows that are there.
"""
