"""Commands around the pipeline, by what they are about. None of them is needed to run it; changing them reruns nothing."""
