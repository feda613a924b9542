"""A cluster on one machine: three hosts in network namespaces, made by the tests themselves."""
