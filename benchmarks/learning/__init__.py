"""Does federated training learn as well as pooled training, and for how many bytes?

`make bench-learning` runs the short profile; the rooms:

    __main__.py      the program: trials that are missing, then tables, gates and plots
    profiles.py      what the short and the full profile try
    arms.py          how an arm trains: a run spec
    trials.py        one trial: an arm, a seed, learning rates → a result; workers.py    side by side
    federation.py    coordinator and sites in this process; workbench.py    their worker groups
    results.py       results as files, one a trial
    language.py sentiment.py adapters.py sequences.py      the experiments
    corpora.py records.py downloads.py       their data: a folder of texts, records, what pip fetches
    ddp.py           one DDP step by torch alone, to compare with
    gates.py tables.py plots.py      what is made of results
"""
