"""Groups on the nodes of a Ray cluster: its nodes, and the actors that hold the groups. Ray is optional, and imported when it is used."""
