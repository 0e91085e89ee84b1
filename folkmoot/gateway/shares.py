"""Who is next: the order of each lane, and the counters of lanes and tenants, in Lua; part of prelude.py.

    lane      what was handed back or whose lease ran out, before what is new
    tenants   start-time fair queueing: each tenant has a start tag in virtual time; the lowest is next, becomes the
              lane's virtual time, and grows by cost / weight. A tenant that comes (back) starts at the virtual time, so
              that it gains nothing by having been away, and nobody waits for more than a turn of each other tenant.
              P. Goyal, H. Vin, H. Cheng, "Start-time Fair Queueing", SIGCOMM 1996; by tokens and for requests of
              language models: Y. Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024.
    requests  of a tenant: earliest deadline first. Those without a deadline of their own all have the gateway's, so
              they come in the order of their arrival.

Costs are estimates when a request is leased; `settle` puts the tag right when its tokens are known. All is O(log n).
Nothing is kept of a tenant without requests, but for a finish tag that virtual time has not reached yet; of those at
most MAX_PAST, and none while nobody waits.
"""

SHARES = """
local MAX_PAST = 1000

local function lane_key(kind, r) return root .. ':' .. kind .. ':' .. r.model .. ':' .. r.lane end
-- The length keeps any two (model, tenant) apart, whatever colons are in them.
local function waiting_key(r)
  return root .. ':waiting:' .. r.lane .. ':' .. #r.model .. ':' .. r.model .. ':' .. r.tenant
end

local function count(r, state, sign)
  local lane, tenants = lane_key('load', r), lane_key('tenant-load', r)
  for name, amount in pairs({[state .. '_requests'] = sign, [state .. '_tokens'] = sign * r.cost}) do
    redis.call('HINCRBY', lane, name, amount)
    local field = name .. ' ' .. r.tenant
    if redis.call('HINCRBY', tenants, field, amount) == 0 then redis.call('HDEL', tenants, field) end
  end
  local owed = redis.call('ZINCRBY', lane_key('tenants', r), sign * r.cost, r.tenant)
  if tonumber(owed) <= 0 then redis.call('ZREM', lane_key('tenants', r), r.tenant) end
end

local function virtual_time(r) return tonumber(redis.call('HGET', lane_key('load', r), 'virtual_time') or 0) end
local function tag_of(kind, r) return tonumber(redis.call('ZSCORE', lane_key(kind, r), r.tenant) or nil) end
local function in_tokens(r, cost) return cost / tonumber(redis.call('HGET', root .. ':weights', r.tenant) or 1) end

-- A tenant whose last waiting request is gone keeps its finish tag until virtual time has passed it.
local function leave_turns(r, finish)
  redis.call('ZREM', lane_key('turns', r), r.tenant)
  local past = lane_key('past', r)
  if redis.call('EXISTS', lane_key('turns', r)) == 0 then
    redis.call('DEL', past)
  elseif finish > virtual_time(r) then
    redis.call('ZADD', past, finish, r.tenant)
    redis.call('ZREMRANGEBYRANK', past, 0, -MAX_PAST - 1)
  end
end

-- A new request. When it came is its entry's id, milliseconds-sequence; the latter becomes a fraction of the former.
local function line_up(r)
  local ms, sequence = string.match(r.entry, '(%d+)-(%d+)')
  redis.call('ZADD', waiting_key(r), r.deadline - now + ms + math.min(sequence, 1023) / 1024, r.entry)
  if not tag_of('turns', r) then
    redis.call('ZADD', lane_key('turns', r), math.max(virtual_time(r), tag_of('past', r) or 0), r.tenant)
    redis.call('ZREM', lane_key('past', r), r.tenant)
  end
end

-- A request that was leased before: ahead of all new ones. Those on their last attempt stand in a line of their own.
local function line_up_again(r, is_last)
  if is_last then
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

-- Out of whatever line it stands in. A new request that leaves without having been leased costs its tenant nothing.
local function leave_line(r)
  redis.call('ZREM', lane_key('leases', r), r.entry)
  redis.call('ZREM', lane_key('last', r), r.entry)
  if redis.call('ZREM', waiting_key(r), r.entry) == 1 and redis.call('EXISTS', waiting_key(r)) == 0 then
    leave_turns(r, tag_of('turns', r))
  end
end

-- The first lease of a request: its tenant's turn is over.
local function charge(r)
  local start = tag_of('turns', r)
  redis.call('HSET', lane_key('load', r), 'virtual_time', start)
  redis.call('ZREMRANGEBYSCORE', lane_key('past', r), '-inf', start)
  redis.call('ZREM', waiting_key(r), r.entry)
  local finish = start + in_tokens(r, r.cost)
  if redis.call('EXISTS', waiting_key(r)) == 1 then
    redis.call('ZADD', lane_key('turns', r), finish, r.tenant)
  else
    leave_turns(r, finish)
  end
end

-- What was charged too much or too little. Not below virtual time: nobody saves up turns.
local function settle(r, used)
  if r.epoch == 0 or used == r.cost then return end
  for _, kind in ipairs({'turns', 'past'}) do
    local tag = tag_of(kind, r)
    if tag then
      tag = math.max(virtual_time(r), tag + in_tokens(r, used - r.cost))
      redis.call('ZADD', lane_key(kind, r), tag, r.tenant)
    end
  end
end
"""
