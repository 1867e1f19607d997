"""Tests of residua.pipelines."""
