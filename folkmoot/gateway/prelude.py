"""What the queue's scripts (scripts.py) have in common, in Lua: keys, the journal, and how a request ends."""

from folkmoot.gateway.access_scripts import LIMITS
from folkmoot.gateway.layout import CHECK_LAYOUT
from folkmoot.gateway.shares import SHARES

# Request hash: model lane tenant body digest cost answer weight state epoch attempts tries engine entry next submitted
#               deadline queue_deadline grace attended retention watchers error token_ms trace
PRELUDE = (
    """
local root = KEYS[1]
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local outbox = {}

local function request_key(id) return root .. ':request:' .. id end
local function journal_key(id) return root .. ':journal:' .. id end
local function queue_key(model, lane) return root .. ':queue:' .. model .. ':' .. lane end

"""
    + SHARES
    + LIMITS
    + """
-- Protobuf framing of internal.Batch, Event, and GenerateResponse with offset and finish: see proto/folkmoot/v1.
local function varint(n)
  local out = ''
  while n > 127 do
    out = out .. string.char(n % 128 + 128)
    n = math.floor(n / 128)
  end
  return out .. string.char(n)
end
local function bytes_field(tag, value) return string.char(tag) .. varint(#value) .. value end
local function finish(offset, reason, code, message)
  local body = string.char(8) .. varint(reason) .. string.char(16) .. varint(code) .. bytes_field(26, message)
  return string.char(16) .. varint(offset) .. bytes_field(50, body)
end
local CANCELLED, DEADLINE, ERROR = 3, 4, 5

-- Journal one entry and hand it to whoever watches; pushes leave together at the end (flush).
local function journal(id, r, offset, payload)
  redis.call('XADD', journal_key(id), offset .. '-*', 'd', payload)
  if r.watchers and r.watchers ~= '' then
    local event = bytes_field(10, bytes_field(10, id) .. bytes_field(18, payload))
    for gateway in string.gmatch(r.watchers, '%S+') do
      local box = outbox[gateway] or {}
      box[#box + 1] = event
      outbox[gateway] = box
    end
  end
end
local function flush()
  for gateway, box in pairs(outbox) do
    redis.call('PUBLISH', root .. ':pushes:' .. gateway, table.concat(box))
  end
end

local FIELDS = {'model', 'lane', 'tenant', 'cost', 'answer', 'weight', 'state', 'epoch', 'attempts', 'tries', 'engine',
                'entry', 'next', 'deadline', 'queue_deadline', 'grace', 'attended', 'retention', 'watchers', 'token_ms'}
local NUMBERS = {'cost', 'answer', 'weight', 'epoch', 'attempts', 'tries', 'next', 'deadline', 'queue_deadline',
                 'grace', 'attended', 'retention', 'token_ms'}
local function read(id)
  local values = redis.call('HMGET', request_key(id), unpack(FIELDS))
  if not values[1] then return nil end
  local r = {}
  for i, name in ipairs(FIELDS) do r[name] = values[i] end
  for _, name in ipairs(NUMBERS) do r[name] = tonumber(r[name]) end
  r.tries = r.tries or r.attempts -- a record of a version without
  return r
end

-- An engine's leases, by request id.
local function held_key(engine) return root .. ':held:' .. engine end
local function free(id, r)
  if r.state == 'running' then redis.call('SREM', held_key(r.engine), id) end
end

-- Numbers of a lane that only grow.
local function tally(r, what) redis.call('HINCRBY', lane_key('load', r), what, 1) end

-- The one way to end a request. `by` is the epoch of the engine that ends it, 0 for anyone else, who says in
-- `r.outcome` why (metrics_queue.OUTCOMES). `used`: the tokens that it really took, prompt and answer, or nil.
local function close(id, r, offset, payload, by, used)
  journal(id, r, offset, payload)
  tally(r, 'ended_' .. (r.outcome or (by > 0 and 'answered' or 'dropped')))
  count(r, r.state == 'running' and 'running' or 'waiting', -1)
  leave_line(r)
  free(id, r)
  used = used or (r.answer > 0 and r.cost - r.answer + offset or r.cost)
  if r.epoch > 0 then settle(r, used) end
  settle_minutes(r, used)
  rank(r)
  redis.call('XDEL', queue_key(r.model, r.lane), r.entry)
  if r.state == 'running' and by == 0 then
    redis.call('PUBLISH', root .. ':control:' .. r.engine, id)
  end
  redis.call('HSET', request_key(id), 'state', 'done', 'closed_by', by, 'next', offset)
  redis.call('PEXPIRE', request_key(id), r.retention)
  redis.call('PEXPIRE', journal_key(id), r.retention)
  r.state = 'done'
end

-- Ends what has outlived its deadline, its time in the queue, or its client. True where the request is over.
local function over(id, r)
  if r.state == 'done' then return true end
  if now >= r.deadline then
    r.outcome = 'deadline'
    close(id, r, r.next, finish(r.next, DEADLINE, 4, 'the deadline passed before the request was finished'), 0)
  elseif r.state == 'queued' and r.epoch == 0 and now >= r.queue_deadline then
    r.outcome = 'untaken'
    close(id, r, r.next, finish(r.next, ERROR, 14, 'no engine took the request in time; retry later'), 0)
  elseif r.grace > 0 and now >= r.attended then
    r.outcome = 'abandoned'
    close(id, r, r.next, finish(r.next, CANCELLED, 1, 'the client went away and did not come back'), 0)
  end
  return r.state == 'done'
end

local function bury(id, r, message)
  redis.call('XADD', root .. ':dead:' .. r.model, 'MAXLEN', '~', 10000, '*', 'id', id, 'error', message,
             'attempts', r.attempts, 'body', redis.call('HGET', request_key(id), 'body'))
  r.outcome = 'given_up'
  close(id, r, r.next, finish(r.next, ERROR, 13, message), 0)
end

-- `tries` are the attempts since the last token was journalled: an answer that grows outlives engines, but not any
-- number (IN_ALL), since it may be what kills them.
local IN_ALL = 2
local function is_given_up(r, max_attempts) return r.tries >= max_attempts or r.attempts >= IN_ALL * max_attempts end
-- Such a request may be the one that kills engines: see LEASE. It has two trials, where it may have four attempts:
-- one engine may have died of something else.
local function is_last_attempt(r, max_attempts)
  local first = math.min(max_attempts - 1, math.max(2, max_attempts - 2))
  return (r.tries > 0 and r.tries >= first) or r.attempts == IN_ALL * max_attempts - 1
end
-- One that journals before it kills has no such trial before its very last attempt. With whom it shares an engine is
-- narrowed down instead: those that have lost so many are at most so many together, a quarter after each death.
local function group_of(lost, max_attempts)
  return lost > 0 and 4 ^ math.max(0, IN_ALL * max_attempts - 1 - lost) or math.huge
end
local function stands_apart(r, max_attempts) return is_last_attempt(r, max_attempts) or r.attempts >= max_attempts end

-- Takes a lease from its engine; the next engine goes on after the last journalled token. Unless `message` is empty the
-- attempt counts. Returns requeued or buried; the caller wakes the engines (wake).
local woken = {}
local function hand_back(id, r, max_attempts, message)
  if message ~= '' and is_given_up(r, max_attempts) then
    bury(id, r, 'given up after ' .. r.attempts .. ' attempts; last: ' .. message)
    return 'buried'
  end
  move(r, 'running', 'waiting')
  free(id, r)
  if message == '' then r.attempts, r.tries = r.attempts - 1, math.max(0, r.tries - 1) end
  r.state = 'queued'
  redis.call('HSET', request_key(id), 'state', 'queued', 'attempts', r.attempts, 'tries', r.tries, 'error', message)
  line_up_again(r, stands_apart(r, max_attempts))
  rank(r)
  woken[r.model] = true
  return 'requeued'
end
local function wake()
  for model in pairs(woken) do redis.call('PUBLISH', root .. ':work:' .. model, '') end
end
local function gone_key(engine) return root .. ':gone:' .. engine end

local function watch(id, r, gateway)
  if gateway == '' or string.find(' ' .. r.watchers .. ' ', ' ' .. gateway .. ' ', 1, true) then return end
  r.watchers = r.watchers == '' and gateway or (r.watchers .. ' ' .. gateway)
  redis.call('HSET', request_key(id), 'watchers', r.watchers)
end
"""
    + CHECK_LAYOUT
)
