"""One thin module per stage of dvc.yaml: load the parameters, call the library, write the artifact."""
