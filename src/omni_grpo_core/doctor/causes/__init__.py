"""Why a stage broke: from evidence to causes of the catalogue, stage by stage."""
