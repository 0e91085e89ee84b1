"""Lua about keys and limits, beside the queue's own (scripts.py).

Limits are checked where a request is submitted, so that check and charge are one step, whichever gateway it came to,
and a request that is submitted again costs nothing.
"""

# Writes a key's record where it stands as the writer has seen it. ARGV: id, the record seen ('' = none), the new one.
# Returns whether it did (0 or 1).
SWAP_KEY = """
local key = KEYS[1] .. ':api-keys'
if (redis.call('HGET', key, ARGV[1]) or '') ~= ARGV[2] then return 0 end
redis.call('HSET', key, ARGV[1], ARGV[3])
return 1
"""

# Part of prelude.py. Rates are kept as the generic cell rate algorithm does (ITU-T I.371): for each tenant and rate one
# number, the time at which all that it has used is paid off; a minute's worth may be owed at once.
LIMITS = """
local MINUTE = 60000
local function use_key(tenant) return root .. ':use:' .. tenant end
local function paid_off(tenant, what) return math.max(now, tonumber(redis.call('HGET', use_key(tenant), what) or 0)) end

-- ms until a minute has room again; nil: it has now. A request that is more than a minute's worth never has: -1.
local function wait_for(tenant, what, amount, limit)
  local ms = amount * MINUTE / limit
  local wait = paid_off(tenant, what) + ms - MINUTE - now
  if ms > MINUTE then return -1 end
  if wait > 0 then return math.ceil(wait) end
end

local function tenant_count(r, state, models)
  local sum, name = 0, state .. '_requests ' .. r.tenant
  for _, model in ipairs(models) do
    sum = sum + tonumber(redis.call('HGET', lane_key('tenant-load', {model = model, lane = r.lane}), name) or 0)
  end
  return sum
end

-- `limits`: 'requests tokens concurrent share', 0 = none; '' = none at all. Returns nil, or 'limit:NAME:MS'; MS 0: the
-- queue's own hint.
local function over_limits(r, limits, max_requests)
  if limits == '' then return nil end
  local requests, tokens, concurrent, share = string.match(limits, '(%S+) (%S+) (%S+) (%S+)')
  requests, tokens, concurrent, share = tonumber(requests), tonumber(tokens), tonumber(concurrent), tonumber(share)
  if concurrent > 0 then
    local models = redis.call('HKEYS', root .. ':models')
    if tenant_count(r, 'waiting', models) + tenant_count(r, 'running', models) >= concurrent then
      return 'limit:concurrent_requests:0'
    end
  end
  if share > 0 and tenant_count(r, 'waiting', {r.model}) >= math.max(1, math.floor(share * max_requests)) then
    return 'limit:queue_share:0'
  end
  local wait = requests > 0 and wait_for(r.tenant, 'requests', 1, requests)
  if wait then return 'limit:requests_per_minute:' .. wait end
  wait = tokens > 0 and wait_for(r.tenant, 'tokens', r.cost, tokens)
  if wait then return 'limit:tokens_per_minute:' .. wait end
end

local function owe(tenant, what, ms)
  local key, until_ms = use_key(tenant), paid_off(tenant, what) + ms
  if until_ms <= now then
    redis.call('HDEL', key, what)
    return
  end
  redis.call('HSET', key, what, string.format('%.3f', until_ms))
  if redis.call('PTTL', key) < until_ms - now then redis.call('PEXPIREAT', key, math.ceil(until_ms)) end
end

-- Takes down what an admitted request uses, and answers what one of its tokens costs in ms, 0 = they are not counted.
local function charge_minutes(r, limits)
  if limits == '' then return 0 end
  local requests, tokens = string.match(limits, '(%S+) (%S+)')
  if tonumber(requests) > 0 then owe(r.tenant, 'requests', MINUTE / requests) end
  if tonumber(tokens) == 0 then return 0 end
  owe(r.tenant, 'tokens', r.cost * MINUTE / tokens)
  return MINUTE / tokens
end

-- When a request has ended: more or less than was estimated. One that never ran used nothing.
local function settle_minutes(r, used)
  if (r.token_ms or 0) > 0 then owe(r.tenant, 'tokens', ((r.epoch > 0 and used or 0) - r.cost) * r.token_ms) end
end
"""
