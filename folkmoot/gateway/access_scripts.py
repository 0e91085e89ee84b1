"""Scripts about keys and limits, beside the queue's own (scripts.py)."""

# Writes a key's record where it stands as the writer has seen it. ARGV: id, the record seen ('' = none), the new one.
# Returns whether it did (0 or 1).
SWAP_KEY = """
local key = KEYS[1] .. ':api-keys'
if (redis.call('HGET', key, ARGV[1]) or '') ~= ARGV[2] then return 0 end
redis.call('HSET', key, ARGV[1], ARGV[3])
return 1
"""
