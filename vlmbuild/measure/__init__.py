"""Measurements that answer one question: does it still compute the same?"""
