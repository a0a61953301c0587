module mesh.tests/calls

go 1.24
