"""Who is next: the order of each lane, and the counters of lanes and tenants, in Lua; part of prelude.py.

    lane      what was handed back or whose lease ran out, before what is new
    tenants   the one with the least (tokens served + tokens reserved by what it has running) / weight
    requests  of a tenant: earliest deadline first. Those without a deadline of their own all have the gateway's, so
              they come in the order of their arrival.

A request reserves its estimated cost while it runs, and serves its tenant what it really took when it ends. So an
estimate that is too high costs a tenant nothing in the end, and of two tenants that both have requests waiting,
whatever they estimate and however long it goes on,

    served_b / weight_b - served_a / weight_a  <=  reserved_a / weight_a + cost_b / weight_b

(b was chosen before a when b's sum was the smaller one; since then a has not been served less, nor b more than it had
reserved and the one cost). A tenant that comes (back) begins with the least that any waiting tenant was served: it
gains nothing by having been away. After "virtual token counters" of Y. Sheng et al., "Fairness in Serving Large
Language Models" (OSDI 2024), with reservations, so that nobody fills all engines before it is counted.

All is O(log n). Nothing is kept of a tenant without requests but what it was served, as long as that is more than any
tenant begins with; of those at most MAX_PAST, and none while nobody waits.
"""

SHARES = """
local MAX_PAST = 1000

local function lane_key(kind, r) return root .. ':' .. kind .. ':' .. r.model .. ':' .. r.lane end
-- The length keeps any two (model, tenant) apart, whatever colons are in them.
local function waiting_key(r)
  return root .. ':waiting:' .. r.lane .. ':' .. #r.model .. ':' .. r.model .. ':' .. r.tenant
end

local function count_one(r, state, sign)
  local lane, tenants = lane_key('load', r), lane_key('tenant-load', r)
  for name, amount in pairs({[state .. '_requests'] = sign, [state .. '_tokens'] = sign * r.cost}) do
    redis.call('HINCRBY', lane, name, amount)
    local field = name .. ' ' .. r.tenant
    if redis.call('HINCRBY', tenants, field, amount) == 0 then redis.call('HDEL', tenants, field) end
  end
end
local function move(r, from, to)
  if from == to then return end
  count_one(r, from, -1)
  count_one(r, to, 1)
end
local function count(r, state, sign)
  count_one(r, state, sign)
  local owed = redis.call('ZINCRBY', lane_key('tenants', r), sign * r.cost, r.tenant)
  if tonumber(owed) <= 0 then redis.call('ZREM', lane_key('tenants', r), r.tenant) end
end

local function score_of(kind, r) return tonumber(redis.call('ZSCORE', lane_key(kind, r), r.tenant) or nil) end
local function in_shares(r, tokens) return tokens / r.weight end

-- Shares that whoever comes now begins with: the least of all who wait. Never less than before.
local function floor_of(r)
  local least = redis.call('ZRANGE', lane_key('served', r), 0, 0, 'WITHSCORES')[2]
  local floor = math.max(tonumber(redis.call('HGET', lane_key('load', r), 'floor') or 0), tonumber(least or 0))
  redis.call('HSET', lane_key('load', r), 'floor', floor)
  return floor
end

-- The place among the tenants that wait, after anything that it depends on has changed.
local function rank(r)
  local served = score_of('served', r)
  if not served then return end
  local reserved = redis.call('HGET', lane_key('tenant-load', r), 'running_tokens ' .. r.tenant)
  redis.call('ZADD', lane_key('turns', r), served + in_shares(r, tonumber(reserved or 0)), r.tenant)
end

-- Remember what a tenant that does not wait was served, as long as there is somebody to compare it with.
local function remember(r, served)
  local floor, past = floor_of(r), lane_key('past', r)
  if redis.call('EXISTS', lane_key('served', r)) == 0 then
    redis.call('DEL', past)
  elseif served > floor then
    redis.call('ZADD', past, served, r.tenant)
    redis.call('ZREMRANGEBYSCORE', past, '-inf', floor)
    redis.call('ZREMRANGEBYRANK', past, 0, -MAX_PAST - 1)
  end
end

-- A new request. When it came is its entry's id, milliseconds-sequence; the latter becomes a fraction of the former.
local function line_up(r)
  local ms, sequence = string.match(r.entry, '(%d+)-(%d+)')
  redis.call('ZADD', waiting_key(r), r.deadline - now + ms + math.min(sequence, 1023) / 1024, r.entry)
  if not score_of('served', r) then
    redis.call('ZADD', lane_key('served', r), math.max(floor_of(r), score_of('past', r) or 0), r.tenant)
    redis.call('ZREM', lane_key('past', r), r.tenant)
    rank(r)
  end
end

-- A new request no more: it is leased for the first time, or has ended.
local function leave_waiting(r)
  if redis.call('ZREM', waiting_key(r), r.entry) == 0 or redis.call('EXISTS', waiting_key(r)) == 1 then return end
  local served = score_of('served', r)
  floor_of(r)
  redis.call('ZREM', lane_key('served', r), r.tenant)
  redis.call('ZREM', lane_key('turns', r), r.tenant)
  remember(r, served)
end

-- A request that was leased before: ahead of all new ones. Those that are not to run beside all others stand
-- in a line of their own.
local function line_up_again(r, is_apart)
  if is_apart then
    redis.call('ZREM', lane_key('leases', r), r.entry)
    redis.call('ZADD', lane_key('last', r), r.deadline, r.entry)
  else
    redis.call('ZADD', lane_key('leases', r), 0, r.entry)
  end
end

-- Leased, or kept: the score is when it was renewed last.
local function hold(r)
  redis.call('ZADD', lane_key('leases', r), now, r.entry)
  redis.call('ZREM', lane_key('last', r), r.entry)
end

-- Out of whatever line it stands in.
local function leave_line(r)
  if r.epoch == 0 then return leave_waiting(r) end
  redis.call('ZREM', lane_key('leases', r), r.entry)
  redis.call('ZREM', lane_key('last', r), r.entry)
end

-- A request that was leased has ended, and took `used` tokens.
local function settle(r, used)
  local served = score_of('served', r)
  if served then
    redis.call('ZADD', lane_key('served', r), served + in_shares(r, used), r.tenant)
  else
    remember(r, math.max(floor_of(r), score_of('past', r) or 0) + in_shares(r, used))
  end
end
"""
