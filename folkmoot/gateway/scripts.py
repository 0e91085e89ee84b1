"""The queue's state machine, as Lua scripts: each runs atomically in the store, so every rule below holds whoever dies.

    (submit) -> queued -> running -> done
                  ^---------'  lease expired, or handed back (also by who saw its engine die): same journal, next epoch

    - Only `lease` makes a request running; it raises the epoch. Only the holder of the current epoch may append.
    - Tokens are appended at exactly offset `next`; the same ones again are taken as a repeated call and ignored.
    - Only `close` makes a request done, once; it writes the journal's last entry and tells everyone who watches.
    - Whoever touches a request whose deadline has passed, or that nobody attends to any more, closes it.

Who is next is said in shares.py. Times are the store's clock in Unix milliseconds. KEYS[1] is the hash tag all keys
begin with (keys.py).
"""

from folkmoot.gateway.access_scripts import SWAP_KEY
from folkmoot.gateway.batch_scripts import BATCHES
from folkmoot.gateway.metrics_scripts import FIGURES
from folkmoot.gateway.prelude import PRELUDE

# ARGV: gateway, then 17 fields per request. Returns per request: ok | same | taken | full:requests | full:tokens |
# limit:NAME:MS (over_limits).
SUBMIT = (
    PRELUDE
    + """
check_layout()
local gateway = ARGV[1]
local out, fed = {}, {}

-- A full lane still takes requests of tenants that have less than their share of it waiting. So one tenant's flood
-- shuts nobody else out, and however many tenants there are, the lane holds at most (1 + ln max) times max.
local function is_full(r, max_requests, max_tokens)
  local names = {'waiting_requests', 'waiting_tokens'}
  local all = redis.call('HMGET', lane_key('load', r), unpack(names))
  local own = redis.call('HMGET', lane_key('tenant-load', r), names[1] .. ' ' .. r.tenant, names[2] .. ' ' .. r.tenant)
  local tenants = redis.call('ZCARD', lane_key('turns', r)) + (own[1] and 0 or 1)
  if tonumber(all[1] or 0) >= max_requests and tonumber(own[1] or 0) >= math.floor(max_requests / tenants) then
    return 'full:requests'
  end
  local after = tonumber(own[2] or 0) + r.cost
  if tonumber(all[2] or 0) + r.cost > max_tokens and after > max_tokens / tenants and own[1] then
    return 'full:tokens'
  end
end

for i = 2, #ARGV, 17 do
  local id, model, lane, tenant, digest, body = unpack(ARGV, i, i + 5)
  local cost, answer, weight, remaining, queueing, grace, retention = unpack(ARGV, i + 6, i + 12)
  local max_requests, max_tokens = tonumber(ARGV[i + 13]), tonumber(ARGV[i + 14])
  local limits, trace = ARGV[i + 15], ARGV[i + 16]
  local key = request_key(id)
  local known = redis.call('HMGET', key, 'digest', 'watchers')
  if known[1] then
    if known[1] == digest then
      watch(id, {watchers = known[2]}, gateway)
      redis.call('HSET', key, 'attended', now + grace)
      out[#out + 1] = 'same'
    else
      out[#out + 1] = 'taken'
    end
  else
    local r = {model = model, lane = lane, tenant = tenant, cost = tonumber(cost), weight = tonumber(weight),
               deadline = now + remaining}
    local full = over_limits(r, limits, max_requests) or is_full(r, max_requests, max_tokens)
    if full then
      out[#out + 1] = full
    else
      r.entry = redis.call('XADD', queue_key(model, lane), '*', 'id', id, 'cost', cost, 'tenant', tenant)
      redis.call('HSET', key, 'model', model, 'lane', lane, 'tenant', tenant, 'digest', digest, 'body', body,
                 'cost', cost, 'answer', answer, 'weight', weight, 'state', 'queued', 'epoch', 0, 'attempts', 0,
                 'tries', 0, 'engine', '', 'entry', r.entry, 'next', 0, 'submitted', now, 'deadline', r.deadline,
                 'queue_deadline', lane == 'batch' and r.deadline or now + queueing, 'grace', grace,
                 'attended', now + grace, 'retention', retention, 'watchers', gateway,
                 'token_ms', charge_minutes(r, limits))
      if trace ~= '' then redis.call('HSET', key, 'trace', trace) end
      redis.call('PEXPIRE', key, remaining + retention)
      count(r, 'waiting', 1)
      line_up(r)
      redis.call('HINCRBY', root .. ':load:' .. model .. ':' .. lane, 'submitted_tokens', cost)
      fed[model] = true
      out[#out + 1] = 'ok'
    end
  end
end
for model in pairs(fed) do redis.call('PUBLISH', root .. ':work:' .. model, '') end
return out
"""
)

# ARGV: model, engine, max requests and max tokens of both lanes together, the same of the batch lane, max attempts,
# idle ms (leases that were not renewed for so long are taken over).
# Returns per lease: id, epoch, attempt, body, next, remaining ms, submitted, waited ms, cost, journal payloads, trace.
LEASE = (
    PRELUDE
    + """
local model, engine = ARGV[1], ARGV[2]
local room, token_room = tonumber(ARGV[3]), tonumber(ARGV[4])
local batch_room, batch_token_room = tonumber(ARGV[5]), tonumber(ARGV[6])
local max_attempts, idle_ms = tonumber(ARGV[7]), tonumber(ARGV[8])
local out = {}
if redis.call('EXISTS', gone_key(engine)) == 1 then return out end

-- A request on its last attempts is on trial: if its engine dies, it was the cause. So until it has journalled
-- something, no other that has not is in the same engine, and none at all that has lost many; else what kills engines
-- would take others along into the dead letters.
local trial_key = root .. ':trial:' .. engine
local function is_here(r)
  if not r or r.state ~= 'running' or r.engine ~= engine then return false end
  return tonumber(redis.call('ZSCORE', lane_key('leases', r), r.entry) or 0) > now - idle_ms
end
local function on_trial()
  local id = redis.call('GET', trial_key)
  local r = id and read(id)
  return r and r.tries > 0 and is_here(r)
end
-- Of what runs here: how many are silent since their lease, have lost an engine, lost many; and the smallest group.
local here
local function note(r)
  local lost = r.attempts - 1
  if r.tries > 0 then here.silent = here.silent + 1 end
  if lost > 0 then here.retried = here.retried + 1 end
  if lost >= max_attempts then here.lost_many = here.lost_many + 1 end
  here.group = math.min(here.group, group_of(lost, max_attempts))
end
local function look_around()
  if here then return end
  here = {silent = 0, retried = 0, lost_many = 0, group = math.huge}
  for _, id in ipairs(redis.call('SMEMBERS', held_key(engine))) do
    local r = read(id)
    if is_here(r) then note(r) end
  end
end
-- Whether it may run here, and whether it will once nobody is silent.
local function fits(r)
  if r.attempts == 0 then return true, false end
  look_around()
  local is_trial = is_last_attempt(r, max_attempts)
  local may = here.retried < math.min(here.group, group_of(r.attempts, max_attempts))
  if is_trial and here.lost_many > 0 then may = false end
  local waits = may and is_trial and here.silent > 0
  return may and not waits, waits
end

local function take(id, r)
  if is_last_attempt(r, max_attempts) then redis.call('SET', trial_key, id, 'PX', r.deadline - now) end
  move(r, r.state == 'running' and 'running' or 'waiting', 'running')
  free(id, r)
  if r.epoch == 0 then leave_waiting(r) else tally(r, 'leased_again') end
  if r.state == 'running' then tally(r, 'leases_expired') end
  r.state, r.epoch, r.engine = 'running', r.epoch + 1, engine
  r.attempts, r.tries = r.attempts + 1, r.tries + 1
  if here then note(r) end
  rank(r)
  hold(r)
  redis.call('SADD', held_key(engine), id)
  local key = request_key(id)
  redis.call('HSET', key, 'state', 'running', 'epoch', r.epoch, 'attempts', r.attempts, 'tries', r.tries,
             'engine', engine)
  local rest = redis.call('HMGET', key, 'body', 'submitted', 'trace')
  local payloads = {}
  if r.next > 0 then
    for _, item in ipairs(redis.call('XRANGE', journal_key(id), '-', '+')) do payloads[#payloads + 1] = item[2][2] end
  end
  out[#out + 1] = {id, r.epoch, r.attempts, rest[1], r.next, r.deadline - now, tonumber(rest[2]),
                   now - tonumber(rest[2]), r.cost, payloads, rest[3] or ''}
  room, token_room = room - 1, token_room - r.cost
  if r.lane == 'batch' then batch_room, batch_token_room = batch_room - 1, batch_token_room - r.cost end
end

-- One entry that nobody holds now. Its record may be gone: then only the line and the counters are put right. Returns
-- whether it is a trial that only waits for what is silent.
local function consider(found, is_apart)
  local item = redis.call('XRANGE', queue_key(model, found.lane), found.entry, found.entry)[1]
  local id = item and item[2][2]
  local r = id and read(id)
  if not r then
    if item then
      found.cost, found.tenant = tonumber(item[2][4]), item[2][6]
      count(found, found.state, -1)
      redis.call('XDEL', queue_key(model, found.lane), found.entry)
    end
    for _, epoch in ipairs({0, 1}) do
      found.epoch = epoch
      leave_line(found)
    end
  elseif not over(id, r) then
    if is_given_up(r, max_attempts) then
      local last = redis.call('HGET', request_key(id), 'error')
      if not last or last == '' then last = 'the engine was lost' end
      bury(id, r, 'given up after ' .. r.attempts .. ' attempts; last: ' .. last)
      return false
    end
    local fits_now, waits = fits(r)
    if fits_now and (is_apart or not is_last_attempt(r, max_attempts)) then
      take(id, r)
    elseif is_apart then
      return waits
    else
      line_up_again(r, true)
    end
  end
  return false
end

-- What is next in a lane. What ran out or was handed back has all been seen once it is empty, since `now` stands still.
local is_empty = {}
local function next_of(lane)
  local found = {model = model, lane = lane, state = 'waiting', tenant = ''}
  if not is_empty[lane] then
    local idle = redis.call('ZRANGE', lane_key('leases', found), '-inf', now - idle_ms, 'BYSCORE', 'LIMIT', 0, 1,
                            'WITHSCORES')
    if idle[1] then
      found.entry, found.state = idle[1], idle[2] == '0' and 'waiting' or 'running'
      return found
    end
    is_empty[lane] = true
  end
  found.tenant = redis.call('ZRANGE', lane_key('turns', found), 0, 0)[1]
  found.entry = found.tenant and redis.call('ZRANGE', waiting_key(found), 0, 0)[1]
  return found.entry and found
end

local function has_room(lane)
  return room > 0 and token_room > 0 and (lane == 'interactive' or (batch_room > 0 and batch_token_room > 0))
end

-- Requests that stand apart. Returns whether nothing else is to be leased now: one is on trial, or waits for what is
-- silent, which will soon be so no more. Others may wait for long, and stop nobody.
local SEEN = 64 -- of a lane: who does not fit is read again at each lease
local function take_apart()
  for _, lane in ipairs({'interactive', 'batch'}) do
    local found = {model = model, lane = lane, state = 'waiting', tenant = ''}
    for _, entry in ipairs(redis.call('ZRANGE', lane_key('last', found), 0, SEEN - 1)) do
      if not has_room(lane) then break end
      found.entry = entry
      if consider(found, true) or on_trial() then return true end
    end
  end
  return false
end

local function take_others()
  for _, lane in ipairs({'interactive', 'batch'}) do
    while has_room(lane) do
      local found = next_of(lane)
      if not found then break end
      consider(found, false)
    end
  end
end

if not on_trial() and not take_apart() then
  take_others()
  if #out == 0 then take_apart() end
end
flush()
return out
"""
)

# ARGV: pairs id, epoch. Returns per lease: held | lost | done.
RENEW = (
    PRELUDE
    + """
local out = {}
for i = 1, #ARGV, 2 do
  local id, epoch = ARGV[i], tonumber(ARGV[i + 1])
  local r = read(id)
  if not r or r.epoch ~= epoch or (r.state ~= 'running' and r.state ~= 'done') then
    out[#out + 1] = 'lost'
  elseif over(id, r) then
    out[#out + 1] = 'done'
  else
    hold(r)
    out[#out + 1] = 'held'
  end
end
flush()
return out
"""
)

# ARGV: per append: id, epoch, offset, number of tokens, payload, last (0 or 1), with the last the tokens that the
# request took, prompt and answer (0: not known).
# Returns per append: ok | lost | done | gap.
APPEND = (
    PRELUDE
    + """
local out = {}
-- What waits for that may go on now.
local function one_suspect_less(r)
  if redis.call('EXISTS', lane_key('last', r)) == 1 then redis.call('PUBLISH', root .. ':work:' .. r.model, '') end
end
for i = 1, #ARGV, 7 do
  local id, epoch, offset = ARGV[i], tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2])
  local size, payload, last = tonumber(ARGV[i + 3]), ARGV[i + 4], ARGV[i + 5] == '1'
  local used = tonumber(ARGV[i + 6])
  local r = read(id)
  if not r or r.epoch ~= epoch or r.state == 'queued' then
    out[#out + 1] = 'lost'
  elseif r.state == 'done' then
    local mine = tonumber(redis.call('HGET', request_key(id), 'closed_by')) == epoch and offset + size <= r.next
    out[#out + 1] = mine and 'ok' or 'done'
  elseif offset + size <= r.next and size > 0 and not last then
    out[#out + 1] = 'ok'
  elseif offset ~= r.next then
    out[#out + 1] = 'gap'
  elseif over(id, r) then
    out[#out + 1] = 'done'
  elseif last then
    -- A closing entry without tokens shares its offset with none: the next free one.
    close(id, r, offset, payload, epoch, used > 0 and used or nil)
    if r.attempts > 1 then one_suspect_less(r) end
    redis.call('HSET', request_key(id), 'next', offset + size)
    out[#out + 1] = 'ok'
  else
    journal(id, r, offset, payload)
    if offset == 0 then redis.call('PEXPIREAT', journal_key(id), r.deadline + r.retention) end
    redis.call('HSET', request_key(id), 'next', offset + size, 'tries', 0)
    if r.tries > 0 then one_suspect_less(r) end
    out[#out + 1] = 'ok'
  end
end
flush()
return out
"""
)

# Gives leases back. ARGV: max attempts, then per lease id, epoch, error ('' = the attempt is not counted).
# Returns per lease: requeued | buried | lost | done.
RELEASE = (
    PRELUDE
    + """
local max_attempts = tonumber(ARGV[1])
local out = {}
for i = 2, #ARGV, 3 do
  local id, epoch, message = ARGV[i], tonumber(ARGV[i + 1]), ARGV[i + 2]
  local r = read(id)
  if not r or r.epoch ~= epoch or r.state == 'queued' then
    out[#out + 1] = 'lost'
  elseif over(id, r) then
    out[#out + 1] = 'done'
  else
    out[#out + 1] = hand_back(id, r, max_attempts, message)
  end
end
wake()
flush()
return out
"""
)

# Gives back all that a dead engine holds, and lets it have no lease any more. ARGV: engine, max attempts, error (as
# above). Returns the number of leases. What another engine has taken over is held in that one's name.
ABANDON = (
    PRELUDE
    + """
local engine, max_attempts, message = ARGV[1], tonumber(ARGV[2]), ARGV[3]
redis.call('SET', gone_key(engine), message, 'PX', 600000)
redis.call('ZADD', root .. ':engines', 'XX', now, engine)
local given = 0
for _, id in ipairs(redis.call('SMEMBERS', held_key(engine))) do
  local r = read(id)
  if not r then
    redis.call('SREM', held_key(engine), id)
  elseif not over(id, r) then
    hand_back(id, r, max_attempts, message)
    given = given + 1
  end
end
wake()
flush()
return given
"""
)

# ARGV: id, reason. Returns unknown | done | cancelled.
CANCEL = (
    PRELUDE
    + """
local r = read(ARGV[1])
if not r then return 'unknown' end
if over(ARGV[1], r) then flush() return 'done' end
r.outcome = 'cancelled'
close(ARGV[1], r, r.next, finish(r.next, CANCELLED, 1, ARGV[2]), 0)
flush()
return 'cancelled'
"""
)

# What a gateway does for its open streams once a second. ARGV: ids. Returns per id: next, done (0 or 1); -1, 1 if gone.
ATTEND = (
    PRELUDE
    + """
local out = {}
for i = 1, #ARGV do
  local r = read(ARGV[i])
  if not r then
    out[#out + 1] = {-1, 1}
  else
    if r.grace > 0 and r.state ~= 'done' then
      r.attended = now + r.grace
      redis.call('HSET', request_key(ARGV[i]), 'attended', r.attended)
    end
    over(ARGV[i], r)
    out[#out + 1] = {r.next, r.state == 'done' and 1 or 0}
  end
end
flush()
return out
"""
)

# Starts watching. ARGV: gateway ('' = only read), id, offset. Returns nil, or journal payloads from that offset on.
FOLLOW = (
    PRELUDE
    + """
local gateway, id, offset = ARGV[1], ARGV[2], ARGV[3]
local r = read(id)
if not r then return false end
watch(id, r, gateway)
if r.grace > 0 and r.state ~= 'done' then redis.call('HSET', request_key(id), 'attended', now + r.grace) end
over(id, r)
flush()
-- The entry that holds `offset` may begin before it.
local from = redis.call('XREVRANGE', journal_key(id), offset .. '-1', '-', 'COUNT', 1)[1]
local out = {}
for _, item in ipairs(redis.call('XRANGE', journal_key(id), from and from[1] or '-', '+')) do
  out[#out + 1] = item[2][2]
end
return out
"""
)

# ARGV: model, engine, heartbeat ms, record JSON. Also forgets engines long gone.
REGISTER = (
    PRELUDE
    + """
check_layout()
local model, engine, beat_ms, record = unpack(ARGV)
if redis.call('EXISTS', gone_key(engine)) == 1 then return now end
redis.call('ZADD', root .. ':engines', now + beat_ms, engine)
redis.call('HSET', root .. ':engine-models', engine, model)
redis.call('HSET', root .. ':models', model, record)
for _, gone in ipairs(redis.call('ZRANGEBYSCORE', root .. ':engines', '-inf', now - 600000)) do
  redis.call('ZREM', root .. ':engines', gone)
  redis.call('HDEL', root .. ':engine-models', gone)
  redis.call('DEL', held_key(gone))
end
return now
"""
)

ALL = {
    "submit": SUBMIT,
    "lease": LEASE,
    "renew": RENEW,
    "append": APPEND,
    "release": RELEASE,
    "abandon": ABANDON,
    "cancel": CANCEL,
    "attend": ATTEND,
    "follow": FOLLOW,
    "register": REGISTER,
    **BATCHES,
    "swap_key": SWAP_KEY,
    "figures": FIGURES,
}
