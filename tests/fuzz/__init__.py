"""Random programs, run in eager and through the backend, must give the same.

program.py    a program as data, rendered as a script
pieces.py     the parametrizations and control flow that scripts are made of
generate.py   from a seed to a program: its modes
holders.py    from a seed to a program: its modules
grammar.py    from a seed to a program: its statements
themes.py     programs about one thing, which the others seldom meet
themed_statements.py    their statements
run.py        one program, one way: all that can be seen of it
judge.py      several ways compared: who is wrong
campaign.py   many programs, counted
shrink.py     a failing program made small
mutate.py     a rule of sharing switched off: do the programs notice?
registrations.py    sequences of registrations: a refused one changes nothing
"""
