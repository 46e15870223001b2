"""The intermediate representation: programs, regions, printing, serialization, shapes and costs."""
