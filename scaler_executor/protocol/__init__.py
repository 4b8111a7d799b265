"""The pure layer: what is said on the wire and what follows from it.

Nothing in this package opens a socket, starts a thread or a process, reads the clock, draws a random number, pickles
or logs. Each state class (`client`, `scheduler`, `agent`, `link`) turns events into instructions;
`scaler_executor.runtime` carries them out. The two large ones are made of parts, each in a file that begins with their
name. Read `messages` first, then the table in `scheduler_tasks`.
"""
