"""A store that another version has written, in Lua: who submits to a store, or registers an engine, looks first.

An older layout is given up: what waits or runs in it ends with UNAVAILABLE and a word to send it again, so that no
client waits for an answer that never comes; finished answers can still be read. Nothing is done in a newer one: the
call fails. Versions of different layouts do not serve side by side.
"""

from folkmoot.gateway.keys import LAYOUT

CHECK_LAYOUT = (
    f"local LAYOUT = {LAYOUT}"
    + """
local function end_older()
  for _, model in ipairs(redis.call('HKEYS', root .. ':models')) do
    for _, lane in ipairs({'interactive', 'batch'}) do
      local queue = queue_key(model, lane)
      for _, item in ipairs(redis.call('XRANGE', queue, '-', '+')) do
        local id = item[2][2]
        local r = read(id)
        if r and r.state ~= 'done' then
          r.answer, r.weight = 0, 1
          close(id, r, r.next, finish(r.next, ERROR, 14, 'the request store is of a new version now; send it again'), 0)
        end
      end
      local r = {model = model, lane = lane}
      redis.call('DEL', queue, lane_key('load', r), lane_key('tenant-load', r), lane_key('tenants', r))
    end
  end
end

-- Raises an error, which ends the script, where the store is newer than this version.
local function check_layout()
  local found = tonumber(redis.call('GET', root .. ':layout') or 1)
  if found > LAYOUT then
    error('the store has layout ' .. found .. ', this version knows ' .. LAYOUT .. ': use another namespace')
  elseif found < LAYOUT then
    end_older()
    redis.call('SET', root .. ':layout', LAYOUT)
  end
end
"""
)
