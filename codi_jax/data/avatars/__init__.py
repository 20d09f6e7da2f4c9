"""Pictures that are drawn from named attributes: unlimited data with exact captions and exact results of edits."""
