"""The pure layer: what is said on the wire and what follows from it.

Nothing in this package opens a socket, starts a thread or a process, reads the clock, draws a random number, pickles
or logs. Each state class turns events into instructions; `scaler_executor.runtime` carries them out. Read `messages`
first, then the table in `scheduler`.
"""
