"""``fedloom data split``: one data set becomes folders of sites, and how different those are is told.

cli.py       the command
formats.py   how a format is told, and which reader it has
census.py    what one pass over the records finds, in a few bytes a record
textfiles.py jsonlines.py arrowrows.py      the formats: count records, copy them to sites
rules.py     who gets which record: pure functions of the census
skew.py      what the sites then have, and how far each is from all
writing.py   folders and the manifest, whole or not at all
"""
