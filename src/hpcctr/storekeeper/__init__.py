"""The storekeeper: the process that works on the store for one user, once.

Root starts it (:mod:`hpcctr.storekeeper.start`: the engine for ordinary users, root's own command for root). It begins
as root for as long as it takes to go into the caller's cgroups, to the caller's niceness and processors, and to start
the converter beside it (:mod:`hpcctr.image.confinement`); then it is the store's owner for good, with no group,
capability or way to one (:mod:`hpcctr.storekeeper.descent`), and only then looks at what it has to do
(:mod:`hpcctr.storekeeper.work`). It talks to the user's command over a socket, and the engine is out of the way.

So nothing of root's parses what a registry or a user sends; what is downloaded counts for who asked; and the store is
written by its owner alone, who needs no right on any node: a file server may squash root.
"""
