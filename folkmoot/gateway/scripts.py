"""The queue's state machine, as Lua scripts: each runs atomically in the store, so every rule below holds whoever dies.

    (submit) -> queued -> running -> done
                  ^---------'  lease expired, or handed back (also by who saw its engine die): same journal, next epoch

    - Only `lease` makes a request running; it raises the epoch. Only the holder of the current epoch may append.
    - Tokens are appended at exactly offset `next`; the same ones again are taken as a repeated call and ignored.
    - Only `close` makes a request done, once; it writes the journal's last entry and tells everyone who watches.
    - Whoever touches a request whose deadline has passed, or that nobody attends to any more, closes it.

Times are the store's clock in Unix milliseconds. KEYS[1] is the hash tag all keys begin with (keys.py).
"""

from folkmoot.gateway.prelude import PRELUDE

# ARGV: gateway, then 13 fields per request. Returns per request: ok | same | taken | full:requests | full:tokens.
SUBMIT = (
    PRELUDE
    + """
local gateway = ARGV[1]
local out, fed = {}, {}
for i = 2, #ARGV, 13 do
  local id, model, lane, tenant, digest, body = unpack(ARGV, i, i + 5)
  local cost, remaining, queueing, grace, retention, max_requests, max_tokens = unpack(ARGV, i + 6, i + 12)
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
    local r = {model = model, lane = lane, cost = tonumber(cost)}
    local load = redis.call('HMGET', root .. ':load:' .. model .. ':' .. lane, 'waiting_requests', 'waiting_tokens')
    if tonumber(load[1] or 0) >= tonumber(max_requests) then
      out[#out + 1] = 'full:requests'
    elseif tonumber(load[2] or 0) + r.cost > tonumber(max_tokens) and tonumber(load[1] or 0) > 0 then
      out[#out + 1] = 'full:tokens'
    else
      local entry = redis.call('XADD', queue_key(model, lane), '*', 'id', id, 'cost', cost)
      redis.call('HSET', key, 'model', model, 'lane', lane, 'tenant', tenant, 'digest', digest, 'body', body,
                 'cost', cost, 'state', 'queued', 'epoch', 0, 'attempts', 0, 'engine', '', 'entry', entry, 'next', 0,
                 'submitted', now, 'deadline', now + remaining, 'queue_deadline', now + queueing, 'grace', grace,
                 'attended', now + grace, 'retention', retention, 'watchers', gateway)
      redis.call('PEXPIRE', key, remaining + retention)
      count(r, 'waiting', 1)
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

# ARGV: model, engine, max requests, max tokens, max attempts, idle ms (look for leases that were not renewed for so
# long; 0: do not look).
# Returns per lease: id, epoch, attempt, body, next, remaining ms, submitted, waited ms, cost, journal payloads.
LEASE = (
    PRELUDE
    + """
local model, engine = ARGV[1], ARGV[2]
local room, token_room = tonumber(ARGV[3]), tonumber(ARGV[4])
local max_attempts, idle_ms = tonumber(ARGV[5]), tonumber(ARGV[6])
local out = {}
if redis.call('EXISTS', gone_key(engine)) == 1 then return out end

-- A request on its last attempt may be the one that kills engines. An engine runs one of them at a time, so that no
-- other goes into the dead letters with it.
local trial_key = root .. ':trial:' .. engine
local function is_last_attempt(r) return r.attempts > 0 and r.attempts == max_attempts - 1 end
local function on_trial()
  local id = redis.call('GET', trial_key)
  local r = id and read(id)
  return r and r.state == 'running' and r.engine == engine
end

local function take(id, r)
  if is_last_attempt(r) then redis.call('SET', trial_key, id, 'PX', r.deadline - now) end
  count(r, r.state == 'running' and 'running' or 'waiting', -1)
  r.state, r.epoch, r.attempts = 'running', r.epoch + 1, r.attempts + 1
  count(r, 'running', 1)
  local key = request_key(id)
  redis.call('HSET', key, 'state', 'running', 'epoch', r.epoch, 'attempts', r.attempts, 'engine', engine)
  local rest = redis.call('HMGET', key, 'body', 'submitted')
  local payloads = {}
  if r.next > 0 then
    for _, item in ipairs(redis.call('XRANGE', journal_key(id), '-', '+')) do payloads[#payloads + 1] = item[2][2] end
  end
  out[#out + 1] = {id, r.epoch, r.attempts, rest[1], r.next, r.deadline - now, tonumber(rest[2]),
                   now - tonumber(rest[2]), r.cost, payloads}
  room, token_room = room - 1, token_room - r.cost
end

-- One entry of a queue, that nobody holds now. Its record may be gone: then only the counters are put right.
local function consider(queue, lane, entry, fields)
  local id = fields[2]
  local r = read(id)
  if not r or r.state == 'done' then
    redis.call('XACK', queue, 'engines', entry)
    redis.call('XDEL', queue, entry)
    if not r then count({model = model, lane = lane, cost = tonumber(fields[4])}, 'waiting', -1) end
  elseif not over(id, r) then
    if r.attempts >= max_attempts then
      local last = redis.call('HGET', request_key(id), 'error')
      if not last or last == '' then last = 'the engine was lost' end
      bury(id, r, 'given up after ' .. r.attempts .. ' attempts; last: ' .. last)
    elseif is_last_attempt(r) and on_trial() then
      leave(r)
    else
      take(id, r)
    end
  end
end

local function create(queue) redis.pcall('XGROUP', 'CREATE', queue, 'engines', '0', 'MKSTREAM') end

for _, lane in ipairs({'interactive', 'batch'}) do
  local queue = queue_key(model, lane)
  if idle_ms > 0 then
    create(queue)
    local cursor = '0-0'
    repeat
      if room <= 0 or token_room <= 0 then break end
      local claimed = redis.call('XAUTOCLAIM', queue, 'engines', engine, idle_ms, cursor, 'COUNT', 1)
      for _, item in ipairs(claimed[2]) do consider(queue, lane, item[1], item[2]) end
      cursor = claimed[1]
    until cursor == '0-0'
  end
  while room > 0 and token_room > 0 do
    local got = redis.pcall('XREADGROUP', 'GROUP', 'engines', engine, 'COUNT', 1, 'STREAMS', queue, '>')
    if got and got.err then  -- no group yet
      create(queue)
      got = redis.call('XREADGROUP', 'GROUP', 'engines', engine, 'COUNT', 1, 'STREAMS', queue, '>')
    end
    if not got then break end
    local item = got[1][2][1]
    consider(queue, lane, item[1], item[2])
  end
end
flush()
return out
"""
)

# ARGV: engine, then pairs id, epoch. Returns per lease: held | lost | done.
RENEW = (
    PRELUDE
    + """
local engine = ARGV[1]
local out = {}
for i = 2, #ARGV, 2 do
  local id, epoch = ARGV[i], tonumber(ARGV[i + 1])
  local r = read(id)
  if not r or r.epoch ~= epoch or (r.state ~= 'running' and r.state ~= 'done') then
    out[#out + 1] = 'lost'
  elseif over(id, r) then
    out[#out + 1] = 'done'
  else
    redis.call('XCLAIM', queue_key(r.model, r.lane), 'engines', engine, 0, r.entry, 'JUSTID')
    out[#out + 1] = 'held'
  end
end
flush()
return out
"""
)

# ARGV: per append: id, epoch, offset, number of tokens, payload, last (0 or 1).
# Returns per append: ok | lost | done | gap.
APPEND = (
    PRELUDE
    + """
local out = {}
for i = 1, #ARGV, 6 do
  local id, epoch, offset = ARGV[i], tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2])
  local size, payload, last = tonumber(ARGV[i + 3]), ARGV[i + 4], ARGV[i + 5] == '1'
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
    close(id, r, offset, payload, epoch)
    redis.call('HSET', request_key(id), 'next', offset + size)
    out[#out + 1] = 'ok'
  else
    journal(id, r, offset, payload)
    if offset == 0 then redis.call('PEXPIREAT', journal_key(id), r.deadline + r.retention) end
    redis.call('HSET', request_key(id), 'next', offset + size)
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

# Gives back all that a dead engine holds, and lets it have no lease any more. ARGV: model, engine, max attempts, error
# (as above). Returns the number of leases. What another engine has taken over is pending in that one's name.
ABANDON = (
    PRELUDE
    + """
local model, engine, max_attempts, message = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
redis.call('SET', gone_key(engine), message, 'PX', 600000)
redis.call('ZADD', root .. ':engines', 'XX', now, engine)
local given = 0

local function consider(queue, entry)
  local item = redis.call('XRANGE', queue, entry, entry)[1]
  local id = item and item[2][2]
  local r = id and read(id)
  if r and r.state == 'running' and r.engine == engine and not over(id, r) then
    hand_back(id, r, max_attempts, message)
    given = given + 1
  end
end

for _, lane in ipairs({'interactive', 'batch'}) do
  local queue, from, pending = queue_key(model, lane), '-', nil
  repeat
    pending = redis.pcall('XPENDING', queue, 'engines', from, '+', 100, engine)
    if pending.err then break end  -- no group yet
    for _, item in ipairs(pending) do
      consider(queue, item[1])
      from = '(' .. item[1]
    end
  until #pending < 100
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

# ARGV: model, engine, heartbeat ms, record JSON. Also clears consumers of engines long gone.
REGISTER = (
    PRELUDE
    + """
local model, engine, beat_ms, record = unpack(ARGV)
if redis.call('EXISTS', gone_key(engine)) == 1 then return now end
redis.call('ZADD', root .. ':engines', now + beat_ms, engine)
redis.call('HSET', root .. ':engine-models', engine, model)
redis.call('HSET', root .. ':models', model, record)
for _, gone in ipairs(redis.call('ZRANGEBYSCORE', root .. ':engines', '-inf', now - 600000)) do
  local served = redis.call('HGET', root .. ':engine-models', gone)
  redis.call('ZREM', root .. ':engines', gone)
  redis.call('HDEL', root .. ':engine-models', gone)
  for _, lane in ipairs({'interactive', 'batch'}) do
    local queue = queue_key(served, lane)
    local pending = redis.pcall('XPENDING', queue, 'engines', '-', '+', 1, gone)
    if not pending.err and #pending == 0 then redis.call('XGROUP', 'DELCONSUMER', queue, 'engines', gone) end
  end
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
}
