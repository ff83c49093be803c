"""
What a program needs around the algorithms.

    stages.py       one function for each stage of RLHF, and SFT: the place where the algorithms are put together
    config.py       every setting, once; limits.py: what each of them may be
    run.py          what the stages leave for each other in a run's folder; folder.py: the files themselves
    report.py       what is printed at the end; views.py: single answers, token by token; page.py: the page
    pairs.py        preference files of any form
    progress.py     bars, checkpoints, --resume
"""
